"""The text of the embedding demo: four subjects, three sentences each, of very different lengths."""

SUBJECTS = {
    "harbour": (
        "The ferry left at dawn.",
        "Before the sun had risen above the breakwater, the first boat of the day was already under way with "
        "a handful of sleepy passengers on deck.",
        "Ships depart early from this port because the tide, which runs hard through the narrow entrance, "
        "turns shortly after six; a captain who misses it has to wait until the afternoon, and by then the "
        "wind has usually freshened so much that the crossing to the islands becomes a wet and unpleasant "
        "affair for everybody on board.",
    ),
    "bread": (
        "Knead the dough for ten minutes.",
        "A loaf rises better when the yeast is given a warm place and plenty of time.",
        "My grandmother never weighed her flour: she added water until the mixture felt right under her "
        "hands, left it under a cloth beside the stove overnight, and in the morning shaped it into rounds "
        "that she baked on hot stones until the crust was dark and sang as it cooled.",
    ),
    "computers": (
        "Cache misses are slow.",
        "Reading data from main memory costs a processor hundreds of cycles in which it could have computed.",
        "A program that visits a large matrix block by block, so that every value it loads is used many "
        "times before it is evicted, can run an order of magnitude faster than one that performs exactly the "
        "same arithmetic but streams the whole matrix from memory again for each row of the result.",
    ),
    "birds": (
        "Swallows fly south in autumn.",
        "Every year storks gather on the meadows before they set out on their journey to Africa.",
        "How a young cuckoo that has never met its parents finds the way to the winter quarters of its kind, "
        "alone and at night, over mountains and desert, is a question that has kept ornithologists busy for "
        "generations, and the answer seems to involve the stars, the magnetic field and a good deal of luck.",
    ),
}

SENTENCES = [(subject, text) for subject, texts in SUBJECTS.items() for text in texts]
