"""The command line: parse and print, no work."""
