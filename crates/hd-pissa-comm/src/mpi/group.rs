//! The exchange among processes: each process sends to and receives from every peer, and polls all
//! messages against one deadline.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::transfer::{Tag, Transfer, World};
use super::wire::{Farewell, Header};
use crate::call::{Call, compare};
use crate::{CommError, Traffic};

/// How long messages of a worker may still arrive after its farewell.
const GRACE: Duration = Duration::from_millis(200);
/// How long a failed or panicked worker stays until its farewells have left.
const PARTING: Duration = Duration::from_millis(200);
/// A worker that waits longer than this sleeps between polls.
const PATIENCE: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(50);

pub(super) struct Group {
    world: World,
    timeout: Duration,
    peers: Vec<Peer>,
    /// The open calls, in the order in which they started.
    calls: VecDeque<InFlight>,
    /// Number of the next call.
    next: u64,
    traffic: Traffic,
    failure: Option<CommError>,
}

struct Peer {
    index: usize,
    /// Its farewell, until it has left.
    farewell: Option<Transfer>,
    /// Content and time of its farewell.
    left: Option<(Farewell, Instant)>,
}

/// An open call.
struct InFlight {
    number: u64,
    own: Header,
    payload: Arc<Vec<u8>>,
    /// One exchange with each peer, in the order of peers.
    exchanges: Vec<Exchange>,
    /// Whether nobody waits for it now.
    abandoned: bool,
}

impl InFlight {
    fn done(&self) -> bool {
        self.exchanges.iter().all(Exchange::done)
    }
}

/// The messages of one call to and from one peer.
struct Exchange {
    peer: usize,
    sends: Vec<Transfer>,
    header: Option<Transfer>,
    announced: Option<Header>,
    payload: Option<Transfer>,
    received: Option<Vec<u8>>,
    sent: bool,
}

impl Exchange {
    fn poll(&mut self, world: &World) -> Result<(), CommError> {
        if let Some(mut header) = self.header.take() {
            if header.poll()? {
                let announced =
                    Header::decode(&header.into_bytes()).ok_or_else(|| CommError::Transfer {
                        workers: [world.index, self.peer],
                        reason: "what came is not a header of this program".into(),
                    })?;
                self.announced = Some(announced);
                self.payload = (announced.bytes > 0)
                    .then(|| world.receive(self.peer, Tag::Payload, announced.bytes));
            } else {
                self.header = Some(header);
            }
        }
        if let Some(mut payload) = self.payload.take() {
            if payload.poll()? {
                self.received = Some(payload.into_bytes());
            } else {
                self.payload = Some(payload);
            }
        }
        self.sent = true;
        for send in &mut self.sends {
            self.sent &= send.poll()?;
        }
        Ok(())
    }

    /// Whether it is complete.
    fn done(&self) -> bool {
        self.header.is_none() && self.payload.is_none() && self.sent
    }
}

impl Group {
    pub(super) fn start(timeout: Duration) -> Result<Self, CommError> {
        let world = World::init()?;
        let len = Farewell::len(world.size);
        let peers = (0..world.size)
            .filter(|&index| index != world.index)
            .map(|index| Peer {
                index,
                farewell: Some(world.receive(index, Tag::Farewell, len)),
                left: None,
            })
            .collect();
        Ok(Self {
            world,
            timeout,
            peers,
            calls: VecDeque::new(),
            next: 0,
            traffic: Traffic::default(),
            failure: None,
        })
    }

    pub(super) fn index(&self) -> usize {
        self.world.index
    }

    pub(super) fn size(&self) -> usize {
        self.world.size
    }

    /// The names of the machines that the workers run on, by index.
    pub(super) fn machines(&mut self) -> Result<Vec<Vec<u8>>, CommError> {
        let machines = self.call(Call::AllGatherBytes, self.world.machine())?;
        self.traffic = Traffic::default();
        Ok(machines)
    }

    /// Traffic of the completed calls.
    pub(super) fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Makes a call and waits for the others'; see [`complete`](Self::complete).
    pub(super) fn call(&mut self, call: Call, payload: Vec<u8>) -> Result<Vec<Vec<u8>>, CommError> {
        let number = self.begin(call, payload)?;
        self.complete(number)
    }

    /// Starts a call. Its messages move whenever a call starts or is waited for.
    pub(super) fn begin(&mut self, call: Call, payload: Vec<u8>) -> Result<u64, CommError> {
        self.or_fail(|group| group.try_begin(call, payload))
    }

    /// The bytes that each worker sent in a call, by index; empty for those without a payload.
    pub(super) fn complete(&mut self, number: u64) -> Result<Vec<Vec<u8>>, CommError> {
        self.or_fail(|group| group.try_complete(number))
    }

    /// Nobody will wait for this call.
    pub(super) fn abandon(&mut self, number: u64) {
        for call in &mut self.calls {
            call.abandoned |= call.number == number;
        }
    }

    fn or_fail<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let result = work(self);
        if let Err(error) = &result {
            self.failure = Some(error.clone());
            self.part(&Farewell::Failed(error.clone()));
        }
        result
    }

    fn try_begin(&mut self, call: Call, payload: Vec<u8>) -> Result<u64, CommError> {
        let part = |worker| part(call, payload.len(), worker, self.world.size);
        let parts: Vec<_> = (0..self.world.size).map(part).collect();
        let own = Header {
            call,
            bytes: parts[self.world.index].len(),
        };
        let (header, payload) = (Arc::new(own.encode()), Arc::new(payload));
        self.poll_farewells()?;
        let world = &self.world;
        let exchanges = self
            .peers
            .iter()
            .map(|&Peer { index: peer, .. }| {
                let mut sends = vec![world.send(peer, Tag::Header, header.clone(), 0..Header::LEN)];
                if own.bytes > 0 {
                    let part = parts[peer].clone();
                    sends.push(world.send(peer, Tag::Payload, payload.clone(), part));
                }
                Exchange {
                    peer,
                    sends,
                    header: Some(world.receive(peer, Tag::Header, Header::LEN)),
                    announced: None,
                    payload: None,
                    received: None,
                    sent: false,
                }
            })
            .collect();
        let number = self.next;
        self.next += 1;
        self.calls.push_back(InFlight {
            number,
            own,
            payload,
            exchanges,
            abandoned: false,
        });
        self.poll_calls()?;
        Ok(number)
    }

    fn try_complete(&mut self, number: u64) -> Result<Vec<Vec<u8>>, CommError> {
        let start = Instant::now();
        let position = loop {
            self.poll_calls()?;
            let position = self.calls.iter().position(|call| call.number == number);
            let position = position.expect("a call is waited for once");
            if self.calls[position].done() {
                break position;
            }
            self.poll_farewells()?;
            let exchanges = &self.calls[position].exchanges;
            self.refuse_departed(exchanges)?;
            if start.elapsed() > self.timeout {
                return Err(self.timed_out(exchanges));
            }
            let waiting = exchanges.iter().any(|exchange| exchange.header.is_some());
            pause(waiting && start.elapsed() > PATIENCE);
        };
        let call = self.calls.remove(position).expect("found above");
        let mut headers = vec![call.own; self.world.size];
        let mut payloads = vec![Vec::new(); self.world.size];
        for exchange in call.exchanges {
            headers[exchange.peer] = exchange.announced.expect("all headers arrived");
            payloads[exchange.peer] = exchange.received.unwrap_or_default();
        }
        let calls: Vec<_> = headers
            .iter()
            .map(|header| (header.call, header.bytes / header.call.value_size()))
            .collect();
        compare(&calls)?;
        let sent: Vec<_> = headers.iter().map(|header| header.bytes).collect();
        self.traffic.count(self.world.index, &sent);
        // Every send is complete, so nothing shares the buffer.
        let mut own = Arc::unwrap_or_clone(call.payload);
        let part = part(call.own.call, own.len(), self.world.index, self.world.size);
        own.truncate(part.end);
        own.drain(..part.start);
        payloads[self.world.index] = own;
        Ok(payloads)
    }

    /// Moves the messages of the open calls.
    fn poll_calls(&mut self) -> Result<(), CommError> {
        // Ask for a peer's payload before reading its next header: MPI gives messages with the same
        // tag to the first request.
        let mut blocked = vec![false; self.peers.len()];
        for call in &mut self.calls {
            for (exchange, blocked) in call.exchanges.iter_mut().zip(&mut blocked) {
                if !*blocked {
                    exchange.poll(&self.world)?;
                    *blocked = exchange.header.is_some();
                }
            }
        }
        self.calls.retain(|call| !(call.abandoned && call.done()));
        Ok(())
    }

    /// Reads which workers left, and fails if one of them left because of a failure.
    fn poll_farewells(&mut self) -> Result<(), CommError> {
        for peer in &mut self.peers {
            let Some(mut message) = peer.farewell.take() else {
                continue;
            };
            if !message.poll()? {
                peer.farewell = Some(message);
                continue;
            }
            let farewell = Farewell::decode(&message.into_bytes());
            peer.left = Some((farewell.clone(), Instant::now()));
            if let Farewell::Failed(error) = farewell {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Fails if the missing worker left before this call.
    fn refuse_departed(&self, exchanges: &[Exchange]) -> Result<(), CommError> {
        let departed = self.peers.iter().zip(exchanges).find(|(peer, exchange)| {
            let left = peer.left.as_ref();
            !exchange.done() && left.is_some_and(|(_, since)| since.elapsed() > GRACE)
        });
        match departed {
            Some((peer, _)) => Err(CommError::WorkerGone { worker: peer.index }),
            None => Ok(()),
        }
    }

    /// Names the workers that did not call; if all called, those whose data did not arrive; if all
    /// data arrived, those that did not take ours.
    fn timed_out(&self, exchanges: &[Exchange]) -> CommError {
        let find = |late: fn(&Exchange) -> bool| -> Vec<usize> {
            let late = exchanges.iter().filter(|exchange| late(exchange));
            late.map(|exchange| exchange.peer).collect()
        };
        let silent = find(|exchange| exchange.header.is_some());
        let slow = find(|exchange| exchange.payload.is_some());
        let deaf = find(|exchange| !exchange.sent);
        let missing = [silent, slow, deaf]
            .into_iter()
            .find(|late| !late.is_empty());
        CommError::TimedOut {
            missing: missing.unwrap_or_default(),
            after: self.timeout,
        }
    }

    /// Sends a farewell to every worker; returns when the messages have left, or soon after.
    fn part(&mut self, farewell: &Farewell) {
        let message = Arc::new(farewell.encode(self.world.size));
        let send = |peer: &Peer| {
            let part = 0..message.len();
            (self.world).send(peer.index, Tag::Farewell, message.clone(), part)
        };
        let mut sends: Vec<Transfer> = self
            .peers
            .iter()
            .filter(|peer| *farewell == Farewell::Done || peer.left.is_none())
            .map(send)
            .collect();
        let start = Instant::now();
        while start.elapsed() < PARTING.min(self.timeout)
            && !sends
                .iter_mut()
                .fold(true, |done, send| done & send.poll().unwrap_or(true))
        {
            pause(true);
        }
    }

    /// Shuts MPI down if every worker got here. Otherwise leaves it to the end of the process,
    /// because MPI's own shutdown would wait for the missing workers.
    pub(super) fn leave(mut self) {
        if self.failure.is_some() {
            return;
        }
        if std::thread::panicking() {
            return self.part(&Farewell::Gone);
        }
        let start = Instant::now();
        self.part(&Farewell::Done);
        while self
            .poll_farewells()
            .and_then(|()| self.poll_calls())
            .is_ok()
            && start.elapsed() < self.timeout
        {
            if self.peers.iter().all(|peer| peer.left.is_some()) {
                let done = |peer: &Peer| matches!(peer.left, Some((Farewell::Done, _)));
                if self.peers.iter().all(done) && self.calls.is_empty() {
                    self.world.finalize();
                }
                return;
            }
            pause(start.elapsed() > PATIENCE);
        }
    }
}

/// The part of a payload of `len` bytes that goes to a worker.
fn part(call: Call, len: usize, worker: usize, workers: usize) -> Range<usize> {
    match call {
        Call::ReduceScatter => worker * (len / workers)..(worker + 1) * (len / workers),
        _ => 0..len,
    }
}

fn pause(long: bool) {
    if long {
        std::thread::sleep(NAP);
    } else {
        std::thread::yield_now();
    }
}
