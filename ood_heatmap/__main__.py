"""`python -m ood_heatmap` is the command `ood-heatmap`."""

from ood_heatmap.cli import main

main()
