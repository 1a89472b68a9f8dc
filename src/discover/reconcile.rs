//! What is known of a role, and what changes in it: pure, without a clock and without I/O.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use http::HeaderMap;
use tower::discover::Change;

use super::member::{Bar, Key, Member};
use crate::registry::Session;

/// A record that could be read.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) key: Arc<str>,
    pub(super) session: Session,
    pub(super) call_metadata: Option<Arc<HeaderMap>>,
    pub(super) created: u64,
    pub(super) modified: u64,
}

/// What a watch tells of one key.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Put(Found),
    /// Deleted, or written over with what cannot be read.
    Gone(Arc<str>),
}

/// The sessions of one role.
///
/// Of two with the same address, or the same id, the younger one (by create revision) owns it, and the
/// older one is barred until the owner is gone. That is judged by what the registry has and not by the
/// order in which it is told, so a list and a watch come to the same.
#[derive(Debug, Default)]
pub(super) struct Known {
    members: HashMap<Arc<str>, Entry>,
    by_address: HashMap<Arc<str>, Claims>,
    by_id: HashMap<Arc<str>, Claims>,
}

/// Who claims an address or an id, in order, the owner last. By generation, and by key among those that one
/// transaction made. There is one, nearly always: a vector of one takes 24 bytes, a tree's node 300.
type Claims = Vec<(u64, Arc<str>)>;

#[derive(Clone, Debug)]
struct Entry {
    member: Arc<Member>,
    modified: u64,
}

/// One round of changes: what was said before of each key that it may touch.
#[derive(Default)]
struct Round {
    before: HashMap<Arc<str>, Option<Arc<Member>>>,
    /// Whose end was told.
    ended: HashSet<Arc<str>>,
    addresses: HashSet<Arc<str>>,
    ids: HashSet<Arc<str>>,
}

// === impl Known ===

impl Known {
    /// The set is this now, whatever it was.
    pub(super) fn replace(&mut self, found: Vec<Found>) -> Vec<Change<Key, Arc<Member>>> {
        let mut round = Round::default();
        let listed: HashSet<Arc<str>> = found.iter().map(|f| f.key.clone()).collect();
        let gone: Vec<_> = self
            .members
            .keys()
            .filter(|k| !listed.contains(*k))
            .cloned()
            .collect();
        for key in gone {
            self.remove(&key, &mut round);
        }
        for found in found {
            self.put(found, &mut round);
        }
        self.finish(round)
    }

    /// These things happened, in this order, and count together.
    pub(super) fn apply(
        &mut self,
        steps: impl IntoIterator<Item = Step>,
    ) -> Vec<Change<Key, Arc<Member>>> {
        let mut round = Round::default();
        for step in steps {
            match step {
                Step::Put(found) => self.put(found, &mut round),
                Step::Gone(key) => {
                    self.remove(&key, &mut round);
                    round.ended.insert(key);
                }
            }
        }
        self.finish(round)
    }

    fn put(&mut self, found: Found, round: &mut Round) {
        if let Some(entry) = self.members.get(&found.key) {
            // By revision and not by value alone: a server that writes the same once more wants to be heard.
            // By value too: in a registry that was rebuilt the same revisions come again.
            if entry.member.generation() == found.created
                && entry.modified == found.modified
                && *entry.member.session() == found.session
            {
                return;
            }
        }
        self.remove(&found.key, round);
        let member = Member::new(found.session, found.created);
        let member = Arc::new(member.with_shared_call_metadata(found.call_metadata));
        let claim = (found.created, found.key.clone());
        let (address, id) = claimed(&member);
        claims(&mut self.by_address, address, claim.clone());
        claims(&mut self.by_id, id, claim);
        round.touch(&member);
        let entry = Entry {
            member,
            modified: found.modified,
        };
        self.members.insert(found.key, entry);
    }

    fn remove(&mut self, key: &Arc<str>, round: &mut Round) {
        let entry = self.members.remove(key);
        let member = entry.map(|entry| entry.member);
        round
            .before
            .entry(key.clone())
            .or_insert_with(|| member.clone());
        let Some(member) = member else {
            return;
        };
        let claim = (member.generation(), key.clone());
        let (address, id) = claimed(&member);
        withdraw(&mut self.by_address, address, &claim);
        withdraw(&mut self.by_id, id, &claim);
        round.touch(&member);
    }

    /// Bars and unbars whom the round concerns, and says what came of it.
    fn finish(&mut self, mut round: Round) -> Vec<Change<Key, Arc<Member>>> {
        let claims = round
            .addresses
            .iter()
            .filter_map(|a| self.by_address.get(a));
        let claims = claims.chain(round.ids.iter().filter_map(|i| self.by_id.get(i)));
        let concerned: HashSet<Arc<str>> = claims.flatten().map(|(_, key)| key.clone()).collect();
        for key in concerned {
            let Some(entry) = self.members.get(&key) else {
                continue;
            };
            let bar = self.bar(&key, &entry.member);
            let before = round.before.entry(key.clone());
            before.or_insert_with(|| Some(entry.member.clone()));
            if entry.member.bar() != bar.as_ref() {
                let barred = Arc::new(entry.member.with_bar(bar));
                if let Some(entry) = self.members.get_mut(&key) {
                    entry.member = barred;
                }
            }
        }

        let (mut leaving, mut removed, mut inserted) = (Vec::new(), Vec::new(), Vec::new());
        for (key, before) in round.before {
            let after = self.members.get(&key).map(|entry| entry.member.clone());
            let of = |member: &Arc<Member>| Key::new(key.clone(), member.generation());
            match (before, after) {
                (None, None) => {}
                (None, Some(new)) => inserted.push((of(&new), new)),
                (Some(old), None) => removed.push(of(&old)),
                (Some(old), Some(new)) if old.generation() != new.generation() => {
                    // The same instance at the same address, and no end of it was seen: its record was lost and
                    // written anew, as in an etcd that lost its data. It may well be alive, so its calls finish;
                    // if it was restarted they have ended with its sockets.
                    if claimed(&old) == claimed(&new) && !round.ended.contains(&key) {
                        leaving.push((of(&old), Arc::new(old.leaving())));
                    }
                    removed.push(of(&old));
                    inserted.push((of(&new), new));
                }
                (Some(old), Some(new)) if !Arc::ptr_eq(&old, &new) => {
                    inserted.push((of(&new), new))
                }
                (Some(_), Some(_)) => {}
            }
        }
        // Those that are gone first, then those that are barred: so an address or an id is free when its
        // owner comes, and the last word on an id is its owner's.
        leaving.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        removed.sort_unstable_by_key(|key| key.generation);
        inserted.sort_unstable_by(|(a, m), (b, n)| {
            let rank = |key: &Key, member: &Member| (member.bar().is_none(), key.generation);
            rank(a, m).cmp(&rank(b, n)).then_with(|| a.key.cmp(&b.key))
        });
        let insert = |(key, member)| Change::Insert(key, member);
        let leaving = leaving.into_iter().map(insert);
        let removed = removed.into_iter().map(Change::Remove);
        let inserted = inserted.into_iter().map(insert);
        leaving.chain(removed).chain(inserted).collect()
    }

    fn bar(&self, key: &Arc<str>, member: &Member) -> Option<Bar> {
        let (address, id) = claimed(member);
        let owner = |claims: &HashMap<Arc<str>, Claims>, what: &Arc<str>| {
            let (_, owner) = claims.get(what)?.last()?;
            (owner != key)
                .then(|| self.members.get(owner))
                .flatten()
                .cloned()
        };
        if let Some(owner) = owner(&self.by_address, address) {
            let owner = owner.member.session().id_arc().clone();
            return Some(Bar::Address { owner });
        }
        let owner = owner(&self.by_id, id)?;
        let owner = owner.member.session().address_arc().clone();
        Some(Bar::Id { owner })
    }
}

// === impl Round ===

impl Round {
    fn touch(&mut self, member: &Member) {
        let (address, id) = claimed(member);
        self.addresses.insert(address.clone());
        self.ids.insert(id.clone());
    }
}

fn claimed(member: &Member) -> (&Arc<str>, &Arc<str>) {
    let session = member.session();
    (session.address_arc(), session.id_arc())
}

fn claims(all: &mut HashMap<Arc<str>, Claims>, what: &Arc<str>, claim: (u64, Arc<str>)) {
    let claims = all
        .entry(what.clone())
        .or_insert_with(|| Vec::with_capacity(1));
    if let Err(place) = claims.binary_search(&claim) {
        claims.insert(place, claim);
    }
}

fn withdraw(claims: &mut HashMap<Arc<str>, Claims>, what: &Arc<str>, claim: &(u64, Arc<str>)) {
    if let Some(all) = claims.get_mut(what) {
        if let Ok(place) = all.binary_search(claim) {
            all.remove(place);
        }
        if all.is_empty() {
            claims.remove(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::endpoint::Target as _;

    fn found(key: u32, address: u32, id: u32, created: u64, modified: u64) -> Found {
        Found {
            key: format!("k{key}").into(),
            session: Session::new("echo", format!("h:{}", address + 1))
                .with_id(id)
                .with_version(modified.to_string()),
            call_metadata: None,
            created,
            modified,
        }
    }

    fn shown(changes: &[Change<Key, Arc<Member>>]) -> Vec<String> {
        let show = |change: &Change<Key, Arc<Member>>| match change {
            Change::Remove(key) => format!("-{key}"),
            Change::Insert(key, member) => match member.barred() {
                None => format!("+{key}"),
                Some(why) => format!("+{key} barred: {}", why.reason().unwrap_or_default()),
            },
        };
        changes.iter().map(show).collect()
    }

    #[test]
    fn an_unchanged_session_is_not_spoken_of_again() {
        let mut known = Known::default();
        let list = vec![found(1, 1, 1, 5, 5), found(2, 2, 2, 6, 6)];
        assert_eq!(shown(&known.replace(list.clone())), ["+k1@5", "+k2@6"]);
        assert!(known.replace(list).is_empty());
        assert_eq!(
            shown(&known.replace(vec![found(1, 1, 1, 5, 9)])),
            ["-k2@6", "+k1@5"]
        );
    }

    #[test]
    fn another_generation_under_the_same_key_is_another() {
        let mut known = Known::default();
        known.replace(vec![found(1, 1, 1, 5, 5)]);
        let steps = [Step::Gone("k1".into()), Step::Put(found(1, 1, 1, 9, 9))];
        assert_eq!(shown(&known.apply(steps)), ["-k1@5", "+k1@9"]);
        // As a list tells it, which did not see the delete; and at a lower revision, as of a restored etcd.
        let changes = known.replace(vec![found(1, 1, 1, 3, 3)]);
        assert_eq!(shown(&changes), ["+k1@9", "-k1@9", "+k1@3"]);
        let Change::Insert(_, leaving) = &changes[0] else {
            panic!("it is told that it stops");
        };
        assert!(leaving.stopping(), "its calls are to finish");
        // Elsewhere it is another process, for all that is known.
        let changes = known.replace(vec![found(1, 2, 1, 4, 4)]);
        assert_eq!(shown(&changes), ["-k1@3", "+k1@4"]);
    }

    #[test]
    fn what_comes_and_goes_in_one_message_is_not_spoken_of() {
        let mut known = Known::default();
        let steps = [Step::Put(found(1, 1, 1, 5, 5)), Step::Gone("k1".into())];
        assert!(known.apply(steps).is_empty());
    }

    #[test]
    fn the_younger_owns_an_address_until_it_goes() {
        let mut known = Known::default();
        known.replace(vec![found(7, 1, 7, 5, 5)]);
        let changes = known.apply([Step::Put(found(8, 1, 8, 6, 6))]);
        let barred = "+k7@5 barred: its address h:2 now belongs to instance 8";
        assert_eq!(shown(&changes), [barred, "+k8@6"]);
        let changes = known.apply([Step::Gone("k8".into())]);
        assert_eq!(shown(&changes), ["-k8@6", "+k7@5"]);
    }

    #[test]
    fn the_younger_owns_an_id_and_has_the_last_word_on_it() {
        let mut known = Known::default();
        let changes = known.replace(vec![found(2, 2, 1, 6, 6), found(1, 1, 1, 5, 5)]);
        assert_eq!(
            shown(&changes),
            ["+k1@5 barred: its id 1 now belongs to h:3", "+k2@6"]
        );
    }

    /// The rules once more, as directly as they can be said: everything is judged anew each time.
    fn model(records: &BTreeMap<u32, Found>) -> BTreeMap<Key, (Session, bool)> {
        let owned = |one: &Found, same: &dyn Fn(&Found) -> bool| {
            let rank = |f: &Found| (f.created, f.key.clone());
            records
                .values()
                .filter(|f| same(f))
                .all(|f| rank(f) <= rank(one))
        };
        let judged = records.values().map(|f| {
            let address = owned(f, &|g| g.session.address() == f.session.address());
            let id = owned(f, &|g| g.session.id() == f.session.id());
            let key = Key::new(f.key.clone(), f.created);
            (key, (f.session.clone(), !(address && id)))
        });
        judged.collect()
    }

    #[test]
    fn whatever_happens_what_was_said_is_what_is_there() {
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut known = Known::default();
            let mut records: BTreeMap<u32, Found> = BTreeMap::new();
            let mut said: BTreeMap<Key, (Session, bool)> = BTreeMap::new();
            let mut revision = 1;
            for round in 0..500 {
                let mut steps = Vec::new();
                for _ in 0..random.usize(1..6) {
                    // Several things at one revision, now and then: a transaction.
                    revision += u64::from(random.u8(0..4) > 0);
                    let key = random.u32(0..12);
                    if random.u8(0..3) == 0 {
                        if let Some(gone) = records.remove(&key) {
                            steps.push(Step::Gone(gone.key));
                        }
                        continue;
                    }
                    // No key is written twice at one revision.
                    if records.get(&key).is_some_and(|f| f.modified == revision) {
                        revision += 1;
                    }
                    let created = records.get(&key).map_or(revision, |f| f.created);
                    let new = found(key, random.u32(0..8), random.u32(0..8), created, revision);
                    records.insert(key, new.clone());
                    steps.push(Step::Put(new));
                }
                let changes = if random.u8(0..8) == 0 {
                    let mut list: Vec<_> = records.values().cloned().collect();
                    random.shuffle(&mut list);
                    known.replace(list)
                } else {
                    known.apply(steps)
                };
                for change in changes {
                    match change {
                        Change::Remove(key) => {
                            assert!(
                                said.remove(&key).is_some(),
                                "seed {seed} round {round}: {key}"
                            );
                        }
                        Change::Insert(key, member) => {
                            assert_eq!(key.generation, member.generation());
                            let other = said.keys().find(|k| k.key == key.key && **k != key);
                            assert_eq!(other, None, "two generations of one key");
                            let barred = member.barred().is_some();
                            let new = (member.session().clone(), barred);
                            let old = said.insert(key.clone(), new.clone());
                            // The owner's name in the reason may be all that changed.
                            assert!(old.as_ref() != Some(&new) || barred, "said twice: {key}");
                        }
                    }
                }
                assert_eq!(said, model(&records), "seed {seed} round {round}");
            }
        }
    }
}
