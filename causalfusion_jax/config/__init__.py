"""All settings of a run, built from a config file and checked as a whole."""
