"""The main job: a model in, a cheaper model out, or "none". Orders the rooms' work."""
