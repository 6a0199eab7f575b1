"""What people look at: reports, comparisons, a run in progress, exports, figures."""
