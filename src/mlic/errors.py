"""What can go wrong with a user's input, in words for the user. Every other exception is a bug."""


class MlicError(Exception):
    """Base of all errors that a file, a picture or a setting can cause. The message is one line."""


class DamagedFile(MlicError):
    """The bytes are not an intact .mlic file."""


class UnsupportedFile(MlicError):
    """The file is intact but asks for something this version cannot do."""


class WeightsError(MlicError):
    """Weights are missing, damaged, or not those the file was made with."""


class PictureError(MlicError):
    """The picture cannot be read, or is not one this codec can code."""


class ResultsError(MlicError):
    """A results file cannot be read, is of another version, or does not fit what was asked."""
