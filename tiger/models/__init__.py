"""Recommenders: TIGER, SASRec and simple baselines."""
