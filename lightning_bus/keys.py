"""Keys: who may speak to a broker, kept as files in one directory.

    server.key           the broker's own pair; only the broker reads it
    clients/NAME.toml    a key that is accepted: name, role, public key, when it was made
    revoked/NAME-….toml  one that was
    NAME.key             what its holder needs: move it to the machine that uses it

A key is a CURVE pair with a name and a role. Files appear whole or not at all, and secrets are readable by their owner
only. A broker looks into the directory every second and at every unknown key, so keys come and go while it runs; a
file that it cannot read is no key. Public, secret and server keys are Z85: 40 characters.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
import zmq

from lightning_bus.config import BrokerSection, RunFile
from lightning_bus.errors import ConfigError, Conflict, NotFound, StorageError

ROLES = ("worker", "agent", "gateway", "trainer", "admin")
RUN_ROLES = ("worker", "gateway", "trainer", "admin")  # what the daemons of a run, and its operator, connect as
KEY_ENV = "LIGHTNING_BUS_KEY"  # path of a NAME.key
AUTO = "auto"  # [broker] keys: those in the run's own directory

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")

log = logging.getLogger("lightning_bus.broker")


@dataclass(frozen=True, slots=True)
class Identity:
    """A key that a broker knows, without its secret."""

    name: str
    role: str
    public: str
    created: str = ""  # ISO 8601, UTC
    revoked: bool = False

    @property
    def prefix(self) -> bytes:
        """What the names of its connections begin with."""
        return self.name.encode() + b"/"

    @property
    def fingerprint(self) -> str:
        """Eight characters to tell keys of the same name apart."""
        return hashlib.sha256(self.public.encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class ClientKey:
    """What a client needs to connect: its own pair, and the broker's public key."""

    name: str
    role: str
    public: str
    secret: str = field(repr=False)
    server: str

    @classmethod
    def load(cls, path: Path) -> ClientKey:
        """Return the key in the file that `lightning-bus keys create` wrote. Raises ConfigError."""
        table = _read(path)
        key = cls(
            _text(path, table, "name"), _role(path, table), _z85(path, table, "public"), _z85(path, table, "secret"),
            _z85(path, table, "server"),
        )  # fmt: skip
        _check_pair(path, key.public, key.secret)
        return key


@dataclass(frozen=True, slots=True)
class ServerKey:
    """The broker's own pair."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> ServerKey:
        """Return the server key of that directory. Raises ConfigError when there is none."""
        path = directory / "server.key"
        table = _read(path)
        key = cls(_z85(path, table, "public"), _z85(path, table, "secret"))
        _check_pair(path, key.public, key.secret)
        return key


class KeyRing:
    """The keys that a broker accepts, as its directory says now. Safe to ask from several threads."""

    def __init__(self, directory: Path, server: ServerKey) -> None:
        self.directory = directory
        self.server = server
        self._known: dict[str, Identity] = {}  # by public key; replaced whole, never changed
        self._revoked: dict[str, Identity] = {}
        self._seen: object = None
        self._gone: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, directory: Path) -> KeyRing:
        """Return the ring of that directory. Raises ConfigError when it holds no server key."""
        if not (directory / "server.key").exists():
            raise ConfigError(
                f"[broker] keys: {directory} holds no server.key. Make the first key with: "
                f"lightning-bus keys create NAME --role worker --dir {directory}"
            )
        ring = cls(directory, ServerKey.load(directory))
        ring.refresh()
        return ring

    @property
    def server_secret(self) -> str:
        return self.server.secret

    def lookup(self, public: str | bytes) -> Identity | None:
        """Return who holds this key; None when it is not accepted."""
        return self._known.get(public if isinstance(public, str) else public.decode())

    def admit(self, public: str) -> Identity | str:
        """Return who holds this key, or why it is refused. An unknown key is looked for on disk first."""
        if public not in self._known:
            with self._lock:
                self._scan()
        return self._known.get(public) or ("revoked key" if public in self._revoked else "unknown key")

    def refresh(self) -> set[str]:
        """Look at the directory; return the names whose key was revoked or replaced since this was last asked.

        Costs a look at each file's date. Call it every second.
        """
        with self._lock:
            self._scan()
            gone, self._gone = self._gone, set()
            return gone

    def identities(self) -> list[Identity]:
        """Return every key, accepted ones first, by name."""
        return sorted(
            [*self._known.values(), *self._revoked.values()], key=lambda who: (who.revoked, who.name, who.created)
        )

    def _scan(self) -> None:
        try:
            seen = _stamps(self.directory / "clients"), _stamps(self.directory / "revoked")
        except OSError as exc:
            log.error("cannot look into %s, so keys stay as they are: %s", self.directory, exc)
            return
        if seen == self._seen:
            return
        known = {who.public: who for who in _identities(self.directory / "clients", revoked=False)}
        # A key that stands in both places was being revoked when the broker or the operator was cut off.
        self._revoked = {who.public: who for who in _identities(self.directory / "revoked", revoked=True)}
        known = {public: who for public, who in known.items() if public not in self._revoked}
        gone = {who.name for public, who in self._known.items() if known.get(public) != who}
        self._gone |= gone
        self._known = known
        self._seen = seen


# -- making and revoking ------------------------------------------------------------------------------------------


def create_key(directory: Path, name: str, role: str) -> Path:
    """Make a key and return the file its holder needs, NAME.key. The server's own key is made with the first.

    Raises ConfigError for a name or a role that cannot be, Conflict when there is a key of that name.
    """
    if not _NAME.fullmatch(name) or name == "server":
        raise ConfigError(
            f"{name!r} is no name for a key: 1 to 64 of A-Z a-z 0-9 . _ -, the first no dot or hyphen, and not 'server'."
        )
    if role not in ROLES:
        raise ConfigError(f"role {role!r}: choose one of {', '.join(ROLES)}.")
    server = ensure_server_key(directory)
    registered, path = directory / "clients" / f"{name}.toml", directory / f"{name}.key"
    if registered.exists():
        raise Conflict(f"there is a key {name!r} in {directory}. Choose another name, or revoke that one first.")
    public, secret = _new_pair()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # The secret first: a key that is accepted while nobody holds its secret could only be revoked.
    held = {"name": name, "role": role, "public": public, "secret": secret, "server": server.public}
    if not _write_new(path, held, "Keep this file secret: whoever has it is let in.", 0o600):
        raise Conflict(f"{path} exists. Move it away, or choose another name.")
    entry = {"name": name, "role": role, "public": public, "created": created}
    if not _write_new(registered, entry, "Accepted by the broker while this file is here.", 0o644):
        path.unlink()
        raise Conflict(f"there is a key {name!r} in {directory}. Choose another name, or revoke that one first.")
    return path


def revoke_key(directory: Path, name: str) -> Identity:
    """Revoke a key and return which it was; a broker that runs cuts its connections off within a second.

    Raises NotFound when no such key is accepted.
    """
    path = directory / "clients" / f"{name}.toml"
    if not _NAME.fullmatch(name) or not path.exists():
        raise NotFound(f"{directory} holds no key {name!r}. See: lightning-bus keys list --dir {directory}")
    try:
        identity = _identity(path, revoked=True)
        resting = directory / "revoked" / f"{name}-{identity.fingerprint}.toml"
    except ConfigError:  # unreadable, so not accepted either; it still has to go
        identity = Identity(name, "", "", revoked=True)
        resting = directory / "revoked" / f"{name}-unreadable.toml"
    try:
        resting.parent.mkdir(exist_ok=True)
        path.replace(resting)
        (directory / f"{name}.key").unlink(missing_ok=True)  # of no more use, and in the way of a new one
    except OSError as exc:
        raise StorageError(f"cannot revoke {name!r}: {exc}") from exc
    return identity


def list_keys(directory: Path) -> list[Identity]:
    """Return every key of the directory, revoked ones last. Raises ConfigError when it holds no server key."""
    return KeyRing.load(directory).identities()


def ensure_server_key(directory: Path) -> ServerKey:
    """Return the directory's server key, made on first use. Safe when several ask at once."""
    path = directory / "server.key"
    if not path.exists():
        public, secret = _new_pair()
        _write_new(path, {"public": public, "secret": secret}, "The broker's own. It never leaves this machine.", 0o600)
    return ServerKey.load(directory)


def ensure_run_keys(directory: Path) -> None:
    """Make the keys that the daemons of a run and its operator need, each named like its role, where they are missing.

    A key that was revoked is made anew: the run that asks for it is its holder.
    """
    ensure_server_key(directory)
    for role in RUN_ROLES:
        if not (directory / f"{role}.key").exists() or not (directory / "clients" / f"{role}.toml").exists():
            (directory / f"{role}.key").unlink(missing_ok=True)
            (directory / "clients" / f"{role}.toml").unlink(missing_ok=True)
            create_key(directory, role, role)


# -- finding ------------------------------------------------------------------------------------------------------


def find_key() -> ClientKey | None:
    """Return the key that LIGHTNING_BUS_KEY names, or None. Raises ConfigError when the file cannot be used."""
    named = os.environ.get(KEY_ENV)
    return ClientKey.load(Path(named)) if named else None


def adopt_key(role: str, key: Path | None, file: RunFile | None) -> None:
    """Make this process's clients connect with `key`, or else with the key that its run has for the role, if it has keys.

    A key that LIGHTNING_BUS_KEY names already comes before the run's.
    """
    if key is None and file is not None and KEY_ENV not in os.environ:
        keys = keys_directory(file.section(BrokerSection).keys, file.directory)
        key = None if keys is None else keys / f"{role}.key"
    if key is not None:
        os.environ[KEY_ENV] = str(key.absolute())


def keys_directory(setting: str, run_dir: Path) -> Path | None:
    """Return the directory that [broker] keys means: "" none, "auto" the run's own, else that path."""
    return None if not setting else run_dir / "keys" if setting == AUTO else Path(setting)


# -- files --------------------------------------------------------------------------------------------------------


def _new_pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _stamps(directory: Path) -> list[tuple[str, int, int]]:
    """What tells whether a directory or a file in it has changed."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".toml")]
    except FileNotFoundError:
        return []
    return sorted((name, stat.st_ino, stat.st_mtime_ns) for name, stat in found)


def _identities(directory: Path, *, revoked: bool) -> list[Identity]:
    found: list[Identity] = []
    for path in sorted(directory.glob("*.toml")):
        try:
            found.append(_identity(path, revoked=revoked))
        except ConfigError as exc:
            log.error("not a key: %s", exc)
    return found


def _identity(path: Path, *, revoked: bool) -> Identity:
    table = _read(path)
    name = _text(path, table, "name")
    if not _NAME.fullmatch(name) or not (revoked or path.stem == name):
        raise ConfigError(f"{path}: name = {name!r} is not the file's own. Names cannot be changed; create a new key.")
    return Identity(name, _role(path, table), _z85(path, table, "public"), str(table.get("created", "")), revoked)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read the key {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is no key file: {exc}. Keys are made with: lightning-bus keys create") from exc


def _text(path: Path, table: dict[str, Any], field_name: str) -> str:
    value = table.get(field_name)
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {field_name} is missing. Keys are made with: lightning-bus keys create")
    return value


def _role(path: Path, table: dict[str, Any]) -> str:
    role = _text(path, table, "role")
    if role not in ROLES:
        raise ConfigError(f"{path}: role = {role!r}. Choose one of {', '.join(ROLES)}.")
    return role


def _z85(path: Path, table: dict[str, Any], field_name: str) -> str:
    value = _text(path, table, field_name)
    if not _Z85.fullmatch(value):
        raise ConfigError(f"{path}: {field_name} is not a key: 40 characters of Z85 are due, there are {len(value)}.")
    return value


def _check_pair(path: Path, public: str, secret: str) -> None:
    if zmq.curve_public(secret.encode()).decode() != public:
        raise ConfigError(f"{path}: public and secret are not a pair. Create a new key.")


def _write_new(path: Path, table: dict[str, str], comment: str, mode: int) -> bool:
    """Write a file whole and for good, and only if there is none. False when there is one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"# {comment}\n{tomli_w.dumps(table)}")
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(draft, path)  # unlike a rename it fails when someone was faster
        except FileExistsError:
            return False
        finally:
            draft.unlink()
    except OSError as exc:
        raise StorageError(f"cannot write the key {path}: {exc}") from exc
    return True
