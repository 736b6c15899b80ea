"""Who asks for it: the command line, the run file, cluster submission, the night. Thin."""
