"""The engine behind OpenAI's HTTP interface. Imported by cli/ only."""
