"""All sessions of the server, and which of them are closed when too many are open. No session sees another's data.

A program's session ends with its connection. A page's is kept for some minutes, and for hours with a report that was not saved, so that a
page that is loaded again, or was cut off, finds everything as it was.
"""

import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from med3dvlm.app.scans import OpenScan
from med3dvlm.app.session import Session

MAX_SESSIONS = 64
SECONDS_KEPT = 600.0  # a session whose page is gone
SECONDS_UNSAVED = 4 * 3600.0  # one with a report that a person wrote and did not save
SECONDS_FORGOTTEN = 12 * 3600.0  # after which a session ends of which nothing was heard
FULL = "The server has as many open sessions as it can; close another page of it, or try again later."


class Sessions:
    """All sessions, by the name that Gradio gives a browser session.

    Above `most`, the session that was idle longest is closed, of those without a connection and without an answer in progress. A page may
    also replace a program, or a page that is gone. Otherwise the newcomer is refused.
    """

    def __init__(self, most: int = MAX_SESSIONS) -> None:
        self._by_name: OrderedDict[str, Session] = OrderedDict()
        self._connections: Counter[str] = Counter()
        self._most, self._lock = most, threading.Lock()

    def get(self, name: str) -> Session:
        """Return the session of that name, a new one at its first call. Raises ValueError where there are too many."""
        return self._enter(name, page=False)

    def connect(self, name: str, token: str = "", owner: str | None = None) -> Session:
        """Return the session of a page that was just loaded: the one of that token if the same person had it before, else a new one.

        Raises:
            ValueError: there is no place; one sentence.
        """
        found = self.by_token(token)
        if found is None or not found.page or found.owner != owner:
            session = self._enter(name, page=True)
            session.owner = owner
            return session
        with self._lock:
            for old in [old for old, session in self._by_name.items() if session is found]:
                del self._by_name[old]
            empty = self._by_name.pop(name, None)
            self._by_name[name] = found
            found.seen, found.left = time.monotonic(), None
        if empty is not None:
            empty.close()
        return found

    @contextmanager
    def connection(self, name: str) -> Iterator[None]:
        """Keep the session from being replaced while its page or program holds its connection open."""
        with self._lock:
            self._connections[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._connections[name] -= 1
                self._connections += Counter()  # without those at 0

    def disconnect(self, name: str) -> None:
        """Handle the end of a connection: a program's session is closed, a page's kept for a while."""
        with self._lock:
            session = self._by_name.get(name)
        if session is None or not session.page:
            self.close(name)
            return
        session.disconnect()
        seconds = SECONDS_UNSAVED if session.unsaved else SECONDS_KEPT
        timer = threading.Timer(seconds, self._forget, (session, session.left))
        timer.daemon = True
        timer.start()

    def _forget(self, session: Session, left: float) -> None:
        """Close a session to which nobody came back."""
        if session.left == left:
            for name in [name for name, each in list(self._by_name.items()) if each is session]:
                self.close(name)

    def _enter(self, name: str, page: bool) -> Session:
        with self._lock:
            session, closed = self._by_name.get(name), []
            if session is None:
                closed = self._make_room(page)
                session = self._by_name[name] = Session()
            self._by_name.move_to_end(name)
            session.page |= page
            session.seen, session.left = time.monotonic(), None
        for each in closed:
            each.close()
        return session

    def _make_room(self, page: bool) -> list[Session]:
        """Close sessions to make room for a new one. Raises ValueError where none can be closed."""
        sessions = self._by_name
        closed = [sessions.pop(name) for name in list(sessions) if time.monotonic() - sessions[name].seen > SECONDS_FORGOTTEN]
        if len(sessions) < self._most:
            return closed
        programs = [name for name in sessions if not sessions[name].page]
        resting = (name for name in programs if not self._connections[name] and not any(turn.open for turn in sessions[name].turns))
        gone = (name for name in sessions if sessions[name].left is not None)
        name = next(chain(resting, programs, gone) if page else resting, None)
        if name is None:
            raise ValueError(FULL)
        return [*closed, sessions.pop(name)]

    def by_token(self, token: str) -> Session | None:
        with self._lock:
            sessions = list(self._by_name.values())
        return next((session for session in sessions if secrets.compare_digest(session.token.encode(), token.encode())), None)

    def bytes_with(self, session: Session, scan: OpenScan) -> int:
        """Return the bytes of all open scans once the session has this one; a shared scan counts once."""
        with self._lock:
            others = [other.scan for other in self._by_name.values() if other is not session and other.scan is not None]
        return sum({id(each): each.nbytes for each in (scan, *others)}.values())

    def close_gone(self) -> bool:
        """Close the session that was left longest ago, to free its memory; sessions with an unsaved report stay. Returns whether there was
        one.
        """
        with self._lock:
            gone = {name: session.left for name, session in self._by_name.items() if session.left is not None and not session.unsaved}
        if gone:
            self.close(min(gone, key=lambda name: gone[name] or 0.0))
        return bool(gone)

    def close(self, name: str) -> None:
        with self._lock:
            session = self._by_name.pop(name, None)
        if session is not None:
            session.close()

    def __len__(self) -> int:
        return len(self._by_name)
