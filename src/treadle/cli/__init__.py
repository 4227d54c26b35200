"""The command line: one small file a command; `treadle --help` never imports torch."""
