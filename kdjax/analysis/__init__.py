"""What a comparison of runs says: groups, tests, effect sizes, figures, one page."""
