"""Tasks, trials, sweeps and reports. May import training; the command line comes next."""
