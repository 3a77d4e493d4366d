"""Placeholder until the owner of this file writes it (helper: overwrite freely)."""
from adashard_server.cluster.statistics import Event
import threading
class Registry: pass
class MemoryRegistry(Registry):
    name = "memory"
    def __init__(self): self._e = {}; self._ev = []; self._l = threading.Lock()
    def jobs(self): return list(self._e)
    def read(self, job): return self._e.get(job)
    def swap(self, entry, *, expected):
        with self._l:
            cur = self._e.get(entry.job)
            have = (cur.generation, cur.author) if cur else None
            if cur is not None and have != expected: return False
            self._e[entry.job] = entry; return True
    def append_event(self, job, name, text, facts, time_s):
        with self._l:
            self._ev.append(Event(sequence=len(self._ev)+1, time_s=time_s, job=job, name=name, text=text, facts=dict(facts))); return len(self._ev)
    def events(self, after=0, limit=1000): return [e for e in self._ev if e.sequence>after][:limit]
    def close(self): pass
