//! Which places of an epoch's order a micro-batch takes.

/// How the records of an epoch are dealt to shards.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dealing {
    /// Number of shards; shard `k` of `K` takes places `k`, `k + K`, ...
    pub(crate) shards: usize,
    /// Records per micro-batch.
    pub(crate) batch_size: usize,
}

impl Dealing {
    /// Records of one micro-batch for every shard.
    pub(crate) fn round(self) -> usize {
        self.shards * self.batch_size
    }

    /// The places of micro-batch `index`, counted over all shards.
    pub(crate) fn places(self, index: usize) -> impl Iterator<Item = usize> {
        let Self { shards, batch_size } = self;
        let (micro_batch, shard) = (index / shards, index % shards);
        (0..batch_size).map(move |row| (micro_batch * batch_size + row) * shards + shard)
    }
}
