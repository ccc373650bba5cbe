"""The command line: parse, refuse, format; no logic."""
