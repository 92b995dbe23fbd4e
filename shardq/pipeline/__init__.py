"""The algorithm in the order it happens: plan, block pass, commit, export, evaluate."""
