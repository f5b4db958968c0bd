"""The load of a benchmark: requests on stdin enter, what many nodes measured leaves."""
