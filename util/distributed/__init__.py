"""Several processes: who starts them, what they exchange, how a model is spread over them, and what happens when one fails."""
