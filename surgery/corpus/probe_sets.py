"""The names of the built-in probe sets, and what each asks; ``surgery.corpus.questions`` generates them.

They stand in a module of their own so that the command line can list them at once.
"""

ABOUT = {
    "babel": "composing functions in the bundled model's made-up languages, by number of steps",
    "babel-pairs": "the same, by pair of languages",
    "arithmetic": "sums, differences and products of numbers of 1 to 3 digits, by sign and digits",
    "tracking": "who holds what after several swaps, by number of swaps",
    "recall": "finding the value of a key in a list, by number of pairs",
    "copying": "repeating the same words, by number of words",
    "induction": "continuing as a repeated part did before, by number of words",
}
NAMES = tuple(ABOUT)
