"""Predicts what a job does on a described cluster: the job's own strategies, on virtual ranks and a virtual clock."""
