"""From layers of settings and the facts of a model to one resolved configuration and a proven backend."""
