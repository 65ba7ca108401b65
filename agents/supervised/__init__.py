"""Training on given responses: SFT, and FIGA on edited pairs."""
