"""Runs side by side: their folders read, aligned by tokens, put into tables, plots and assertions."""
