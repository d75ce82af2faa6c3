"""Loading: a data root for trainers and for people who look into it."""
