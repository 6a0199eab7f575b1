"""Views of runs: reports, comparisons, a run in progress, exports, figures."""
