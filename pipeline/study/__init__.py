"""A study: ordinary runs that differ in some settings and in the seed, side by side, and the page that compares them."""
