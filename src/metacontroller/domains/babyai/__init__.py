"""BabyAI: a room with a few objects, to be picked up in the order of a mission, played by minigrid (extra ``babyai``)."""
