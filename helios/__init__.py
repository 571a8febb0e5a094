"""The rest of the official video model: schedules, VAE, text, adapters, and how a folder of weights is loaded."""
