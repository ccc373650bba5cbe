"""The laboratory's command line, built on that of the product."""
