"""The one exception that means "the user can mend this": the command line prints it as a single line."""


class InputError(ValueError):
    """A recipe, argument, dataset or checkpoint that cannot be used as given.

    The message names what was given, what is accepted, and what to do. Programs may catch it as `ValueError`.

    Example:
        >>> raise InputError("lora_r must be at least 1, got 0")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: lora_r must be at least 1, got 0
    """


class TrainingStopped(RuntimeError):
    """A run that had to stop, such as for a non-finite loss; the message says where and what to do.

    Example:
        >>> raise TrainingStopped("loss is nan at step 3")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.TrainingStopped: loss is nan at step 3
    """
