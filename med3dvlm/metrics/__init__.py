"""Scores as pure functions of predictions and references; nothing here knows a model, a data set or a file."""
