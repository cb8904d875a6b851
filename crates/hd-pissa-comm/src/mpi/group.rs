//! The exchange among processes: every message is sent to and received from each peer, and all
//! are polled against one deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::transfer::{Tag, Transfer, World};
use super::wire::{Farewell, Header};
use crate::CommError;
use crate::communicator::{Call, agree};

/// How long the messages of a worker that said farewell may still be on their way.
const GRACE: Duration = Duration::from_millis(200);
/// How long a worker that fails or panics stays to see its farewells leave.
const PARTING: Duration = Duration::from_millis(200);
/// Waiting for workers longer than this, a worker sleeps between polls.
const PATIENCE: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(50);

pub(super) struct Group {
    world: World,
    timeout: Duration,
    peers: Vec<Peer>,
    failure: Option<CommError>,
}

struct Peer {
    index: usize,
    /// Its farewell, under way until it leaves.
    farewell: Option<Transfer>,
    /// What its farewell said, and when it came.
    left: Option<(Farewell, Instant)>,
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
    /// Whether nothing of it is left to do.
    fn poll(&mut self, world: &World) -> Result<bool, CommError> {
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
        Ok(self.done())
    }

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
            failure: None,
        })
    }

    pub(super) fn index(&self) -> usize {
        self.world.index
    }

    pub(super) fn size(&self) -> usize {
        self.world.size
    }

    pub(super) fn machine(&self) -> Vec<u8> {
        self.world.machine()
    }

    /// What each worker sent in this call, by index: nothing from those that had nothing to send.
    pub(super) fn call(
        &mut self,
        call: Call,
        payload: Vec<u8>,
        value_size: usize,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let result = self.exchange(call, payload, value_size);
        if let Err(error) = &result {
            self.failure = Some(error.clone());
            self.part(&Farewell::Failed(error.clone()));
        }
        result
    }

    fn exchange(
        &mut self,
        call: Call,
        payload: Vec<u8>,
        value_size: usize,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let start = Instant::now();
        let own = Header {
            call,
            bytes: payload.len(),
        };
        let (header, payload) = (Arc::new(own.encode()), Arc::new(payload));
        self.poll_farewells()?;
        let world = &self.world;
        let mut exchanges: Vec<Exchange> = self
            .peers
            .iter()
            .map(|&Peer { index: peer, .. }| {
                let mut sends = vec![world.send(peer, Tag::Header, header.clone())];
                if own.bytes > 0 {
                    sends.push(world.send(peer, Tag::Payload, payload.clone()));
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
        loop {
            let mut done = true;
            for exchange in &mut exchanges {
                done &= exchange.poll(&self.world)?;
            }
            if done {
                break;
            }
            self.poll_farewells()?;
            self.refuse_departed(&exchanges)?;
            if start.elapsed() > self.timeout {
                return Err(self.timed_out(&exchanges));
            }
            let waiting = exchanges.iter().any(|exchange| exchange.header.is_some());
            pause(waiting && start.elapsed() > PATIENCE);
        }
        let mut headers = vec![own; self.world.size];
        let mut payloads = vec![Vec::new(); self.world.size];
        for exchange in exchanges {
            headers[exchange.peer] = exchange.announced.expect("all headers arrived");
            payloads[exchange.peer] = exchange.received.unwrap_or_default();
        }
        let calls: Vec<_> = headers
            .iter()
            .map(|header| (header.call, header.bytes / value_size))
            .collect();
        agree(&calls)?;
        // Every send is complete, so that nothing shares the buffer.
        payloads[self.world.index] = Arc::unwrap_or_clone(payload);
        Ok(payloads)
    }

    /// Learns which workers left, and fails if one of them did because of a failure.
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

    /// Fails if a worker that left before this call is the one that is missing.
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

    /// Names the workers that did not call; if all did, those whose data did not come; if it all
    /// came, those that did not take ours.
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

    /// Says farewell to everyone; returns when the messages have left, or soon after.
    fn part(&mut self, farewell: &Farewell) {
        let message = Arc::new(farewell.encode(self.world.size));
        let mut sends: Vec<Transfer> = self
            .peers
            .iter()
            .filter(|peer| *farewell == Farewell::Done || peer.left.is_none())
            .map(|peer| self.world.send(peer.index, Tag::Farewell, message.clone()))
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

    /// Shuts MPI down if every worker got here; otherwise leaves it to the end of the process,
    /// because MPI's own shutdown would wait for the missing ones.
    pub(super) fn leave(mut self) {
        if self.failure.is_some() {
            return;
        }
        if std::thread::panicking() {
            return self.part(&Farewell::Gone);
        }
        let start = Instant::now();
        self.part(&Farewell::Done);
        while self.poll_farewells().is_ok() && start.elapsed() < self.timeout {
            if self.peers.iter().all(|peer| peer.left.is_some()) {
                let done = |peer: &Peer| matches!(peer.left, Some((Farewell::Done, _)));
                if self.peers.iter().all(done) {
                    self.world.finalize();
                }
                return;
            }
            pause(start.elapsed() > PATIENCE);
        }
    }
}

fn pause(long: bool) {
    if long {
        std::thread::sleep(NAP);
    } else {
        std::thread::yield_now();
    }
}
