"""What the checked interpreter raises."""


class CheckError(Exception):
    """A kernel did what hardware can't do, or what hardware does silently and wrongly."""


class OutOfBoundsError(CheckError):
    """An access outside the elements of the argument's view."""


class MisalignedError(CheckError):
    """An address that is not a multiple of the access's size, or a descriptor that hardware can't hold."""


class RaceError(CheckError):
    """Two programs, or two lanes of one store, whose order decides the result."""


class UnwrittenReadError(CheckError):
    """A load of an output that no kernel has stored yet."""


class IntegerOverflowError(CheckError):
    """An integer of 32 bits or fewer that wraps."""


class NoSuchInstructionError(CheckError):
    """A dot or reduction that no GPU has."""
