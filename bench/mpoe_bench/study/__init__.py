"""Studies: arms of a comparison are trained, run by run, and compared by paired t-tests
(bench/README.md)."""
