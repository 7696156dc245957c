"""Errors that a person reads. Every message says what is wrong and what to do about it.

UserError                  anything whose message may be shown as it is, in the page or on the terminal
├── SettingsError          a flag, settings file or option value
├── NameError_             a name from outside that may not become a path
├── DataError              a stored file or database that cannot be read or written
│   └── BadUpload          a file from outside that cannot be read (archive.py)
├── NotFound               a conversation, message, reply or model that is not there (or not yours)
├── Busy                   no place now; `retry_after` says when
├── InUse                  a port or a user_data folder held by another process
├── ModelError             a model that cannot be loaded or used
│   ├── NoModel            nothing is loaded
│   ├── NotANumber         the model computed something that is no number
│   └── EngineDied         the engine process ended or hung during the work
├── PromptError            a prompt or message that cannot be used
│   ├── PromptTooLong      does not fit the context even alone
│   └── TemplateError      a chat template that is wrong, hostile or too slow
├── BadRequest             a field of an API request that cannot be followed (api/errors.py)
│   └── PreviousResponseNotFound  previous_response_id leads nowhere (api/responses.py)
├── NotAvailable           a route of the API with nothing behind it (api/errors.py)
├── DoesNotFit             too little memory for a model; the page may insist (ui/model_routes.py)
├── StaleRevision          the page's parameters are not the ones the server has (ui/routes.py)
└── AccessDenied           not the owner, or asked by a foreign page
    ├── NotLoggedIn        no valid login (auth.py)
    └── WrongKey           no API key, or a wrong one (api/errors.py)

Raise a leaf with the fix in the message; catch at the borders only (page routes, API, command line, thread tops).
`status` is the HTTP status a border answers with.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of all errors whose text is written for the user."""

    status = 400

    @property
    def code(self) -> str:
        """Stable machine-readable name, the same in the page's JSON and in logs."""
        return type(self).__name__.rstrip("_")


class SettingsError(UserError):
    """A flag, key or value in the configuration is wrong."""


class NameError_(UserError):
    """A name given from outside cannot be used as a file name here."""


class DataError(UserError):
    """Stored data could not be read or written."""

    status = 500


class NotFound(UserError):
    """The thing does not exist, or it belongs to somebody else (the two are not told apart)."""

    status = 404


class Busy(UserError):
    """No place right now."""

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        """`retry_after`: seconds after which trying again makes sense."""
        super().__init__(message)
        self.retry_after = retry_after


class InUse(UserError):
    """A port or folder is held by another process."""

    status = 409


class ModelError(UserError):
    """The model cannot be loaded or used."""

    status = 422


class NoModel(ModelError):
    """Nothing is loaded."""

    status = 409


class NotANumber(ModelError):
    """The model computed something that is no number; what it keeps may be spoilt by it."""


class EngineDied(ModelError):
    """The engine process ended during the work."""

    status = 503


class PromptError(UserError):
    """The prompt cannot be used."""

    status = 422


class PromptTooLong(PromptError):
    """The prompt does not fit the model's context."""

    status = 413


class TemplateError(PromptError):
    """The chat template is wrong, hostile or too slow."""


class AccessDenied(UserError):
    """Not logged in, not the owner, or asked by a foreign page."""

    status = 403
