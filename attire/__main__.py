"""`python -m attire`, which `torchrun -m attire` starts: the command line."""

from attire.cli.main import main

main()
