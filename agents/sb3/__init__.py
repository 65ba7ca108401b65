"""stable-baselines3: algorithms by name, baselines with a fixed rule, callbacks, saved policies."""
