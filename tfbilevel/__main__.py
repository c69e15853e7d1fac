"""`python -m tfbilevel`, the same as the command `tfbilevel`."""
