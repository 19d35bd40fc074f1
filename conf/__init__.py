"""Hydra's groups. This file makes conf/ a package, so that `dipole train` finds the same configs as `python scripts/train.py`."""
