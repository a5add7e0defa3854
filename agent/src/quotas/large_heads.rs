//! The number of large request heads in memory: bounded, and lower for one user, so that one user cannot
//! use up the share of the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use throwline_kube_wire::http1::gate::{Allowance, Permit};

use crate::audit::Subject;

/// Heads over 64 KiB at once, of all users. With the copies on their way up each costs 5 MiB at worst.
const MOST: usize = 16;
/// The same of one user.
const MOST_OF_ONE: usize = 4;

/// The agent's account of large heads.
#[derive(Debug, Default)]
pub(crate) struct LargeHeads(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    by_user: HashMap<String, usize>,
}

/// One user's share in it.
pub(crate) struct Share {
    heads: Arc<LargeHeads>,
    subject: Arc<Subject>,
}

/// One large head.
struct Held {
    heads: Arc<LargeHeads>,
    user: String,
}

impl LargeHeads {
    pub(crate) fn share(self: &Arc<Self>, subject: &Arc<Subject>) -> Arc<Share> {
        Arc::new(Share {
            heads: self.clone(),
            subject: subject.clone(),
        })
    }

    fn admit(self: &Arc<Self>, user: &str) -> Option<Held> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = counts.by_user.get(user).copied().unwrap_or_default();
        if counts.all >= MOST || own >= MOST_OF_ONE {
            return None;
        }
        counts.all += 1;
        counts.by_user.insert(user.to_owned(), own + 1);
        Some(Held {
            heads: self.clone(),
            user: user.to_owned(),
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut counts = self.heads.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.all = counts.all.saturating_sub(1);
        match counts.by_user.get_mut(&self.user) {
            Some(own) if *own > 1 => *own -= 1,
            _ => {
                counts.by_user.remove(&self.user);
            }
        }
    }
}

impl Allowance for Share {
    fn admit(&self) -> Option<Permit> {
        let held = self.heads.admit(&self.subject.user.name)?;
        Some(Arc::new(held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_leaves_room_for_others_and_all_comes_back() {
        let heads = Arc::new(LargeHeads::default());
        let mut held: Vec<_> = (0..MOST_OF_ONE)
            .map(|_| heads.admit("eve").unwrap())
            .collect();
        assert!(heads.admit("eve").is_none());
        held.push(heads.admit("dana").unwrap());
        for n in 0..MOST - MOST_OF_ONE - 1 {
            held.push(heads.admit(&format!("user-{n}")).unwrap());
        }
        assert!(heads.admit("last").is_none());
        drop(held);
        let counts = heads.0.lock().unwrap();
        assert_eq!((counts.all, counts.by_user.len()), (0, 0));
    }
}
