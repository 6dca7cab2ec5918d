"""Small shapes of every kind."""

from mpoe_kernels import MPOShape

# Small relatives of every kind of shape: odd sizes, padding, edge positions of the centre, truncated bonds.
SMALL_SHAPES: dict[str, MPOShape] = {
    "paper": MPOShape((3, 2, 2, 2, 1), (2, 2, 2, 3, 2)),
    "paper_bond_4": MPOShape((3, 2, 2, 2, 1), (2, 2, 2, 3, 2), max_bond=4),
    "light": MPOShape((2, 3, 2), (2, 3, 2)),
    "separable": MPOShape((4, 3, 1), (1, 2, 5)),
    "separable_mirrored": MPOShape((4, 3, 1), (1, 2, 5)).mirrored(),
    "separable_bond_3": MPOShape((4, 3, 1), (1, 2, 5), max_bond=3),
    "padded": MPOShape((2, 3, 2), (3, 2, 2), in_features=11, out_features=10),
    "padded_separable": MPOShape((4, 3, 1), (1, 2, 5), in_features=10, out_features=9),
    "uneven_bonds": MPOShape((2, 3, 2, 2), (3, 1, 2, 2), max_bond=(2, None, 3)),
    "one_core": MPOShape((7,), (5,)),
    "centre_first": MPOShape((3, 2), (2, 4), central=0),
    "centre_last": MPOShape((3, 2, 2), (2, 1, 4), central=2),
    "seven_cores": MPOShape((2, 1, 2, 3, 1, 2, 1), (1, 2, 2, 1, 3, 1, 2)),
}
