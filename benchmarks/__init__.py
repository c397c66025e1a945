"""Our code beside the implementations that people use in earnest: `make bench`."""
