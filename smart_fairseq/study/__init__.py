"""Trainings side by side, and tables of what their logs say."""
