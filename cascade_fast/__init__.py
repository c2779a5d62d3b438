"""CASCADE: train new layers on the hard tokens of a frozen language model; every token exits as early as it can."""

__version__ = "0.1.0"
