"""Gangs of processes that are one run: started, watched, ended and started again."""
