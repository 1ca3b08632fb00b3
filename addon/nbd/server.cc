// SPDX-License-Identifier: Apache-2.0
#include "server.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <system_error>

namespace tcmu::nbd {

namespace {

using namespace std::chrono_literals;

constexpr auto kHandshakeLimit = 30s;
// BUSY and TASK SET FULL, from a blocked device or one whose queue is full.
constexpr auto kRepeatAfter = 20ms;
constexpr auto kRepeatLimit = 30s;
constexpr auto kListenAgainAfter = 100ms;

// What epoll tells of: ids of connections, and these.
constexpr uint64_t kWake = UINT64_MAX;
constexpr uint64_t kListener = UINT64_MAX - 1;

std::system_error failure(const char* call) {
  return std::system_error(errno, std::generic_category(), call);
}

}  // namespace

Server::Server(std::shared_ptr<sim::Device> device, Config config, UniqueFd listener,
               Observer& observer)
    : device_(std::move(device)),
      config_(std::move(config)),
      observer_(observer),
      poll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      listener_(std::move(listener)) {
  if (!poll_) throw failure("epoll_create1");
  if (!wake_) throw failure("eventfd");
  epoll_event event{EPOLLIN, {.u64 = kWake}};
  if (epoll_ctl(poll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) < 0) throw failure("epoll_ctl");
  watchListener(true);
  device_->attach(this);
}

Server::~Server() { device_->detach(this); }

// --- other threads ---

void Server::described(uint64_t connection, std::optional<Disk> disk) {
  post({Mail::Kind::described, connection, disk});
}

void Server::close() { post({Mail::Kind::close}); }

void Server::drop() { post({Mail::Kind::drop}); }

void Server::abandon() {
  device_->detach(this);
  listener_.reset();
  closing_ = true;
  for (auto& [id, client] : clients_) client.connection->drop();
  reportClosed();
  std::lock_guard guard(lock_);
  counts_.connections = 0;
}

bool Server::idle() {
  std::lock_guard guard(lock_);
  return underWay_ == 0;
}

Server::Counts Server::counts() {
  std::lock_guard guard(lock_);
  return counts_;
}

void Server::post(Mail mail) {
  {
    std::lock_guard guard(lock_);
    mail_.push_back(mail);
  }
  batchEnd();
}

void Server::finished(const sim::Completion& completion) {
  std::lock_guard guard(lock_);
  completed_.push_back(completion);
  underWay_--;
}

void Server::batchEnd() {
  // The device's own thread serves us next anyhow.
  if (device_->onOwnThread()) return;
  const uint64_t one = 1;
  while (write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
}

// --- the device's thread ---

sim::TimePoint Server::deadline() const {
  sim::TimePoint next = listenAgain_;
  if (!handshakes_.empty()) next = std::min(next, handshakes_.front().first);
  if (!repeats_.empty()) next = std::min(next, repeats_.front().first);
  return next;
}

bool Server::serve(bool readable, sim::TimePoint now) {
  if (readable) pollSockets(now);
  checkDeadlines(now);
  bool served = readable;
  while (takeNews(now) || !batch_.empty() || !touched_.empty()) {
    if (!batch_.empty()) {
      const std::vector<sim::Request> batch = std::exchange(batch_, {});
      {
        std::lock_guard guard(lock_);
        underWay_ += batch.size();
        counts_.commands += batch.size();
      }
      device_->submit(batch);
    }
    settle();
    served = true;
  }
  return served;
}

// Completions and mail. False: there are none.
bool Server::takeNews(sim::TimePoint now) {
  std::vector<Mail> mail;
  taken_.clear();
  {
    std::lock_guard guard(lock_);
    taken_.swap(completed_);
    mail.swap(mail_);
  }
  for (const Mail& each : mail) takeMail(each);
  for (const sim::Completion& completion : taken_) takeCompletion(completion, now);
  return !mail.empty() || !taken_.empty();
}

void Server::takeMail(const Mail& mail) {
  if (mail.kind == Mail::Kind::described) {
    if (Client* client = find(mail.connection)) {
      client->connection->described(mail.disk);
      touch(*client);
    }
    return;
  }
  closing_ = true;
  listener_.reset();
  listenAgain_ = sim::TimePoint::max();
  for (auto& [id, client] : clients_) {
    if (mail.kind == Mail::Kind::drop)
      client.connection->drop();
    else
      client.connection->shutDown();
    touch(client);
  }
  reportClosed();
}

void Server::takeCompletion(const sim::Completion& completion, sim::TimePoint now) {
  const auto index = static_cast<uint32_t>(completion.tag);
  Slot& slot = slots_[index];
  Request& request = *slot.request;
  switch (request.ended(slot.client->connection->disk(), completion)) {
    case Request::Verdict::proceed: return proceed(index);
    case Request::Verdict::again: return submit(index, request.current());
    case Request::Verdict::later: break;
  }
  if (now - slot.since < kRepeatLimit && slot.client->connection->fd() >= 0) {
    repeats_.emplace_back(now + kRepeatAfter, index);
    return;
  }
  request.fail(Errno::io, "the disk stayed busy");
  proceed(index);
}

void Server::proceed(uint32_t index) {
  Slot& slot = slots_[index];
  Request::Scsi command;
  // Nobody waits for the rest of a request whose client is gone.
  if (slot.client->connection->fd() >= 0 &&
      slot.request->next(slot.client->connection->disk(), command))
    return submit(index, command);
  release(index);
}

void Server::submit(uint32_t index, const Request::Scsi& command) {
  batch_.push_back({.tag = index,
                    .initiator = this,
                    .cdb = command.cdb,
                    .dataOut = command.dataOut,
                    .dataIn = command.dataIn});
}

void Server::release(uint32_t index) {
  Slot& slot = slots_[index];
  touch(*slot.client);
  slot.client->connection->finished(std::move(slot.request));
  slot.client = nullptr;
  freeSlots_.push_back(index);
}

void Server::start(Connection& connection, std::unique_ptr<Request> request) {
  if (freeSlots_.empty()) {
    freeSlots_.push_back(static_cast<uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const uint32_t index = freeSlots_.back();
  freeSlots_.pop_back();
  slots_[index] = {find(connection.id()), std::move(request), sim::Clock::now()};
  proceed(index);
}

void Server::describe(Connection& connection) {
  observer_.happened({Observer::Event::Kind::describe, connection.id()});
}

void Server::startTls(Connection& connection, UniqueFd socket, UniqueFd plain) {
  epoll_ctl(poll_.get(), EPOLL_CTL_DEL, socket.get(), nullptr);
  find(connection.id())->polledFd = -1;
  observer_.happened({Observer::Event::Kind::startTls, connection.id(), std::move(socket),
                      std::move(plain)});
}

// --- sockets ---

void Server::pollSockets(sim::TimePoint now) {
  std::array<epoll_event, 64> events;
  const int count =
      epoll_wait(poll_.get(), events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; i++) {
    const epoll_event& event = events[static_cast<size_t>(i)];
    if (event.data.u64 == kWake) {
      uint64_t value;
      while (read(wake_.get(), &value, sizeof value) < 0 && errno == EINTR) {
      }
    } else if (event.data.u64 == kListener) {
      acceptClients(now);
    } else if (Client* client = find(event.data.u64)) {
      client->connection->onEvents(event.events);
      touch(*client);
    }
  }
}

void Server::acceptClients(sim::TimePoint now) {
  while (listener_) {
    UniqueFd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno == EAGAIN) return;
      // No descriptors, most likely: polled on, the listener would wake us for ever.
      watchListener(false);
      listenAgain_ = now + kListenAgainAfter;
      return;
    }
    if (clients_.size() >= config_.maxConnections) continue;
    const uint64_t id = nextConnection_++;
    const sim::TimePoint deadline = now + kHandshakeLimit;
    Client& client = clients_[id];
    client.connection =
        std::make_unique<Connection>(static_cast<Connection::Host&>(*this), config_, std::move(socket), id, deadline);
    handshakes_.emplace_back(deadline, id);
    touch(client);
    std::lock_guard guard(lock_);
    counts_.accepted++;
  }
}

void Server::watchListener(bool watch) {
  epoll_event event{EPOLLIN, {.u64 = kListener}};
  epoll_ctl(poll_.get(), watch ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, listener_.get(), &event);
}

void Server::checkDeadlines(sim::TimePoint now) {
  if (listenAgain_ <= now) {
    listenAgain_ = sim::TimePoint::max();
    watchListener(true);
  }
  for (; !handshakes_.empty() && handshakes_.front().first <= now; handshakes_.pop_front()) {
    Client* client = find(handshakes_.front().second);
    if (!client || client->connection->deadline() > now) continue;
    client->connection->drop();
    touch(*client);
  }
  for (; !repeats_.empty() && repeats_.front().first <= now; repeats_.pop_front()) {
    const uint32_t index = repeats_.front().second;
    submit(index, slots_[index].request->current());
  }
}

void Server::touch(Client& client) {
  if (std::exchange(client.touched, true)) return;
  touched_.push_back(&client);
}

Server::Client* Server::find(uint64_t connection) {
  const auto it = clients_.find(connection);
  return it == clients_.end() ? nullptr : &it->second;
}

// Sends what the clients touched have to get, and lets go of those that are gone.
void Server::settle() {
  const std::vector<Client*> touched = std::exchange(touched_, {});
  bool gone = false;
  for (Client* client : touched) {
    client->touched = false;
    client->connection->flush();
    rearm(*client);
    gone |= client->connection->fd() < 0;
    if (client->connection->over() && !client->touched) clients_.erase(client->connection->id());
  }
  if (touched.empty()) return;
  {
    std::lock_guard guard(lock_);
    counts_.connections = clients_.size();
  }
  if (gone) reportClosed();
}

void Server::rearm(Client& client) {
  const int fd = client.connection->fd();
  if (fd < 0) return;
  const uint32_t events = client.connection->interest();
  if (fd == client.polledFd && events == client.polledEvents) return;
  epoll_event event{events, {.u64 = client.connection->id()}};
  epoll_ctl(poll_.get(), fd == client.polledFd ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
  client.polledFd = fd;
  client.polledEvents = events;
}

void Server::reportClosed() {
  if (!closing_ || reported_) return;
  for (const auto& [id, client] : clients_)
    if (client.connection->fd() >= 0) return;
  reported_ = true;
  observer_.happened({Observer::Event::Kind::closed});
}

}  // namespace tcmu::nbd
