"""BabyAI: a room with objects to be picked up in the order of a mission, played by minigrid (extra ``babyai``)."""
