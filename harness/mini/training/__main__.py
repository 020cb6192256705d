"""`python -m harness.mini.training`: see `train`."""

from harness.mini.training.train import main

main()
