"""Small trainings in a storm of faults, compared with calm ones: `python -m tests.storm --minutes 10`."""
