"""A device's life: what the table of pvdrivers.xenbus says, done to one Device.

A Life never trusts an event: each is a reason to look at what is in the store now, and to take the steps that follow
from it. So events may come late, in bunches or for nothing. All of this runs on the control thread; the device's own
methods run as jobs elsewhere, one at a time, and after each the store is looked at again. No guest makes one raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from .control import Control
from .device import BackKeys, Device, NotRecoverable, NotYet, Publish
from .errors import ConfigError, ProtocolViolation, PvError
from .handling import Handling
from .nodes import QUOTA, Nodes, connection_lost
from .pace import QUIET_SECONDS, Pace
from .storage.locks import DrainingError
from .troubles import Troubles
from .xenbus import Action, BadState, Role, Step, XenbusState, adopt, step
from .xs_wire import XenStoreError

log = logging.getLogger("pvdrivers.device")

S = XenbusState
_MOST_STEPS = 16  # in one go; the handshake of a reconnect takes five
_COSTLY = {Action.ADVERTISE, Action.CONNECT, Action.RECONNECT, Action.RECOVER, Action.RECONFIGURE}
_OF_RINGS = ("grants", "events", "io", "port", "stalled")  # troubles of rings that are no more
_DRAINING_SECONDS = 0.5  # until such a disk is opened again, however long it has taken: its guest waits
_NOT_REFRESHED = "not refreshed: "
_MAY_PASS = (PvError, OSError, MemoryError)  # but for what only the operator can change: ConfigError


class Life:
    """One device, from the moment it is found in the store until it is gone from it."""

    def __init__(self, device: Device, control: Control) -> None:
        self.device = device
        self.ident = device.ident
        self.state = S.Unknown
        """Our state, as it was last seen in the store or written there."""
        self.gone = False
        """The device is no more; nothing will happen here again."""
        self.violations = 0
        self.troubles = Troubles(str(device.ident), control, lambda: control.changed(self))
        self.nodes = Nodes(control, device.ident)
        self._control = control
        self._handling = Handling(device, control)
        self._fresh = True  # nothing done yet: what is in the store is a predecessor's
        self._before: XenbusState | None = None
        self._busy = False  # a job is under way
        self._looking = self._again = self._paused = self._ended = self._refresh = False
        self._ending: Callable[[], None] | None = None
        self._fault: str | None = None
        self._bad = ""
        self._owed: Publish | None = None  # of the connection that there is: still to be written
        self._pace = Pace(control, self.look)

    @property
    def error(self) -> str:
        """What was reported last and is not over, "" if all is well."""
        return self.nodes.reported

    @property
    def connected(self) -> bool:
        """Its rings are in use."""
        return self._handling.connected

    @property
    def in_use(self) -> bool:
        """The same, or they are being taken over from a process that ended."""
        return self.connected or (self._busy and self.state is S.Connected)

    # What may happen

    def handle_frontend_change(self, events: int = 1) -> None:
        """The frontend's state node was written, `events` times."""
        if self.gone or self._paused:
            return
        if not self._pace.take_events(events):
            self._paused = True
            self.troubles.add("storm", "its frontend's state changes too often; it is looked at once a second")
            self._control.pause(self)
            self._control.later(QUIET_SECONDS, self._unpause)
            return
        self.look()

    def handle_live_key(self, events: int = 1) -> None:
        """A key of the frontend's that its class wants to hear of was written: as rarely as its state may be."""
        self._refresh = True
        self.handle_frontend_change(events)

    def handle_backend_change(self, keys: Iterable[str] | None = ()) -> None:
        """`keys` of our own directory were written, by us or by the toolstack; None: nobody can say which."""
        if keys is None or self.nodes.foreign(keys):
            # The operator changed something: what failed may work now, what works may have another size.
            self._pace.release()
            self._refresh = True
        self.look()

    def ask_again(self) -> None:
        """What a NotYet waited for may have happened."""
        if "waiting" in self.troubles.now:
            self._pace.release()
            self.look()

    def refresh(self) -> None:
        """Have the device look again at what is behind it (SIGHUP)."""
        self._refresh = True
        self.look()

    def fault(self, violation: str) -> None:
        """The guest did what no honest guest does: the device closes, and may connect anew."""
        self.violations += 1
        text = str(ProtocolViolation(self.ident.domid, str(self.ident), violation))
        self.troubles.violated(text, self.violations)
        self.drop(text)

    def drop(self, why: str) -> None:
        """Let go of the rings, whatever else is under way, and close: `why` is told."""
        self._fault = why
        self.look()  # does nothing if it is gone

    def notice(self, kind: str, text: str, times: int = 1) -> None:
        """What the workers say: trouble of this kind, or that it is over. A port that is gone is an error as well."""
        before = self.troubles.now.get(kind)
        self.troubles.notice(kind, text, times)
        if kind == "port" and text:
            self.nodes.report(text, logged=True)
        elif before is not None and self.nodes.reported == before:
            self.nodes.clear_report()

    def look(self) -> None:
        """Take the steps that follow from what is in the store now."""
        if self._busy or self._looking or self.gone or self._ended or (self.nodes.not_ours and self._ending is None):
            self._again = True
            return
        self._looking = True
        try:
            self._guarded(self._steps)
        finally:
            self._looking = False

    def hand_over(self, done: Callable[[], None]) -> None:
        """The process ends: let go of the rings, leave the store as it is, and call `done`."""
        if self.gone:
            return done()
        self._ending = done
        self.look()

    # One step

    def _steps(self) -> None:
        for _ in range(_MOST_STEPS):
            self._again = False
            if self._ending is not None:
                return self._end(self._ending)
            if not self._one_step() and not self._again:
                return
            if self._busy or self.gone:
                return
        # No honest pair of ends takes so many: let the others have their turn.
        self._pace.again()

    def _one_step(self) -> bool:
        """Look, and do one thing. False if there was nothing to do."""
        ours, theirs, online = self.nodes.read(whose=not self.connected)
        self._went(ours)
        if isinstance(theirs, BadState):
            # What it means is anybody's guess, and all that follows is that the guest is at fault.
            if online and self._bad != theirs.text:
                self._bad = theirs.text
                self.fault(f"frontend state is {theirs.text}")
            theirs = S.Unknown
        else:
            self._bad = ""
        if self._fault is not None:
            return self._drop(ours, self._fault)
        if self._bad and online:
            return False
        if self._fresh or theirs is not S.Unknown:
            self.troubles.look_for_stale(self.nodes, ours, theirs)
        if self._pace.held is not None and self._pace.held != (ours, theirs):
            self._pace.release()
        if self._fresh:
            wanted = adopt(ours, theirs, online)
        else:
            wanted = step(Role.BACK, ours, theirs, online, before=self._before, connected=self.connected)
        if wanted.action in _COSTLY and not self._pace.take_connect((ours, theirs)):
            return False
        if wanted.action is not Action.RECONNECT:  # or, if that fails, the table would see nothing left to do
            self._before = theirs
        return self._perform(wanted, ours, theirs)

    def _perform(self, wanted: Step, ours: XenbusState, theirs: XenbusState) -> bool:
        action = wanted.action
        if action is Action.NOTHING:
            self._fresh = False
            if self._owed is not None and self.connected:
                # The unchanged state is written again: that is how Linux tells a frontend of a new size.
                self._stepped(ours, theirs, Step(ours, Action.SAY), None, None)
                return self._owed is None
            return self._start_refresh()
        if action is Action.REJECT:
            self.fault(f"frontend went to {theirs.name} while the backend is in {ours.name}")
            return True
        if action is Action.SAY:
            self._publish(ours, {}, wanted.state)
            self._fresh = False
            return True
        if action is Action.CLOSE:
            return self._do(self._handling.disconnect, partial(self._closed, ours, wanted.state))
        if action is Action.REMOVE:
            return self._do(self._handling.remove, partial(self._removed, ours, wanted.state))
        self.device.params = BackKeys.read(self._control.store, self.ident, wait=False)
        jobs = {Action.RECONFIGURE: self.device.reconfigure, Action.ADVERTISE: self._handling.advertise}
        job = jobs.get(action, partial(self._handling.connect, action is Action.RECOVER))
        return self._do(job, partial(self._stepped, ours, theirs, wanted))

    def _drop(self, ours: XenbusState, why: str) -> bool:
        """After a fault: let go of the rings at once, then say Closing, and wait for the frontend."""

        def dropped(result: Any, error: BaseException | None) -> None:
            self.nodes.report(why, logged=True)
            if ours not in (S.Unknown, S.Closing, S.Closed):
                self._publish(ours, {}, S.Closing)
            self._fresh = False
            self._fault = None  # last: if the store fails, all this is done again

        return self._do(self._handling.disconnect, dropped)

    def _start_refresh(self) -> bool:
        if not (self._refresh and self.connected):
            self._refresh = False
            return False
        self.device.params = BackKeys.read(self._control.store, self.ident, wait=False)
        self._refresh = False  # not before: if the store fails, it is done when that is back
        return self._do(self.device.refresh, self._refreshed)

    # Jobs run elsewhere, and nothing else happens to this device meanwhile; then what follows on them

    def _do(self, job: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> bool:
        def done(result: Any, error: BaseException | None) -> None:
            self._busy = False
            # Within look() this only has it go round once more. Who is to end does so with the store away, too.
            if self._guarded(partial(then, result, error)) or self._ending is not None:
                self.look()

        self._busy = True
        self._control.submit(job, done)
        return True

    def _guarded(self, call: Callable[[], None]) -> bool:
        """Calls it; False, and another try is under way, if something went wrong that is not the guest's."""
        try:
            call()
            return True
        except OSError as e:
            if connection_lost(e):
                self._control.store_lost()  # which has all devices looked at when it is back
                return False
            log.error("%s: %s", self.ident, e)
        except Exception:
            log.exception("%s: our own fault", self.ident)
        self._pace.again()
        return False

    def _stepped(
        self, ours: XenbusState, theirs: XenbusState, wanted: Step, keys: Publish | None, error: BaseException | None
    ) -> None:
        recovered, published = wanted.action is Action.RECOVER, False
        if error is None:
            keys = {**(self._owed or {}), **(keys or {})}
            if wanted.action is Action.ADVERTISE:
                keys.setdefault("hotplug-status", "connected")
            if wanted.action in (Action.RECOVER, Action.RECONFIGURE):
                # Its rings are in use now, and are not to be taken over from ourselves: that would drop them.
                self._fresh, self._owed = False, keys
            try:
                of = self.device.params if wanted.action is Action.ADVERTISE else None
                published = self._publish(ours, keys, None if recovered else wanted.state, of)
            except NotYet as e:
                error = e
            except OSError as e:
                if connection_lost(e):
                    raise
                if e.errno in QUOTA:
                    self.troubles.add("quota", str(e), logging.DEBUG)  # the log has it as an error
                error = e
        if error is not None:
            return self._failed(ours, theirs, wanted, error)
        self._pace.release()
        self.nodes.tell(self.device.wrong)
        rings = wanted.action in _COSTLY - {Action.RECONFIGURE}
        self.troubles.over("waiting", "draining", "quota", *(_OF_RINGS if rings else ()))
        if published:
            self._owed = None
            if wanted.action is not Action.SAY:
                self._pace.note(self.ident, "taken over from a process that ended" if recovered else wanted.state.name)
        self._fresh = False
        self._before = theirs
        self._control.changed(self)

    def _failed(self, ours: XenbusState, theirs: XenbusState, wanted: Step, error: BaseException) -> None:
        advertising = wanted.action is Action.ADVERTISE
        if isinstance(error, ProtocolViolation):
            return self.fault(error.violation)
        if isinstance(error, NotYet):
            self.troubles.add("waiting", str(error), logging.INFO)
            return self._pace.wait((ours, theirs), error.seconds)
        if isinstance(error, DrainingError):
            self.troubles.add("draining", str(error), logging.DEBUG)  # the log has it as an error
        if isinstance(error, NotRecoverable):
            self.nodes.report(f"cannot be taken over, and reconnects: {error}")
        elif isinstance(error, _MAY_PASS) and (wanted.action is Action.RECOVER or not isinstance(error, ConfigError)):
            # Our state stays, so that the handshake goes on from here when the cause has passed: Closing may be final.
            self.nodes.report(str(error) or repr(error), hotplug=advertising)
            self._pace.hold((ours, theirs), _DRAINING_SECONDS if isinstance(error, DrainingError) else None)
            self._control.changed(self)
            return
        else:
            if not isinstance(error, ConfigError):
                log.error("%s: our own fault in %s", self.ident, wanted.action.value, exc_info=error)
            self.nodes.report(str(error) or repr(error), hotplug=advertising)
        if advertising:
            self._pace.hold_still((ours, theirs))  # until the operator changes something
            self._control.changed(self)
        elif ours is not S.Closing:
            self._publish(ours, {}, S.Closing)
        self._fresh = False

    def _refreshed(self, keys: Publish | None, error: BaseException | None) -> None:
        if error is not None:
            self._refresh |= isinstance(error, XenStoreError) and connection_lost(error)
            return self.nodes.report(f"{_NOT_REFRESHED}{error}")
        if keys:
            self._owed = {**(self._owed or {}), **keys}  # the device says it once; the look that follows writes it
        if not self.device.lost and ("port" in self.troubles.now or self.nodes.reported.startswith(_NOT_REFRESHED)):
            self.troubles.over("port")
            self.nodes.clear_report()

    def _closed(self, ours: XenbusState, state: XenbusState, _: Any, error: BaseException | None) -> None:
        if self._publish(ours, {}, state):
            self._pace.note(self.ident, state.name)
        self._fresh = False

    def _removed(self, ours: XenbusState, state: XenbusState, _: Any, error: BaseException | None) -> None:
        self.gone = True
        self.troubles.gone()
        self._pace.release()
        try:
            # Only now: to the toolstack Closed means that nothing is held any more, the image included.
            if ours not in (S.Unknown, S.Closed) and self.nodes.leave(state):
                self._went(state)
            self.nodes.clear_report()
            self.nodes.tidy()
        except OSError as e:
            log.warning("%s: removed, but: %s", self.ident, e)
            if connection_lost(e):
                self._control.store_lost()
        # What a toolstack has not taken away yet is found once more: that was said.
        log.log(logging.DEBUG if self._fresh and ours is S.Closed else logging.INFO, "%s: removed", self.ident)
        self._control.gone(self)
        if self._ending is not None:
            self._ending()

    def _end(self, done: Callable[[], None]) -> None:
        def handed(result: Any, error: BaseException | None) -> None:
            self._busy = False
            if error is not None:
                log.error("%s: while handing over", self.ident, exc_info=error)
            done()

        self._ended = self._busy = True
        self._handling.connected = False
        self._pace.release()
        self._control.submit(self.device.hand_over, handed)

    def _publish(self, ours: XenbusState, keys: Publish, state: XenbusState | None, of: BackKeys | None = None) -> bool:
        published = self.nodes.publish(ours, keys, state, of)
        if published and state is not None:
            self._went(state)
        return published

    def _went(self, state: XenbusState) -> None:
        """Our state is this one now."""
        if state is not self.state:
            self.state = state
            self.troubles.went(state)
            self._control.changed(self)

    def _unpause(self) -> None:
        self._paused = False
        self.troubles.over("storm")
        if not self.gone:
            self._control.resume(self)
            self.look()
