// SPDX-License-Identifier: Apache-2.0
// The NBD server: a listening socket, its connections, and their requests as commands of a simulated
// device.
//
// Everything runs on the device's own thread (sim::Guest), so that between the socket and the ring
// no other thread has to be woken; what other threads bring (completions, answers, `close`) waits in
// a list until that thread takes it. It never blocks, and what a client can make it hold is bounded.
//
// End: `close` stops listening and lets each client's requests finish, `drop` closes the sockets at
// once; either way commands under way keep their memory until the device has completed them. The
// owner keeps the server until its device has stopped or `idle`.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "connection.h"

namespace tcmu::nbd {

// Hears of what the server can't do itself. Called on the device's thread; must not block.
class Observer {
 public:
  struct Event {
    enum class Kind { describe, startTls, closed } kind;
    uint64_t connection = 0;
    UniqueFd socket{};  // for startTls: see Connection::Host
    UniqueFd plain{};
  };
  virtual void happened(Event event) = 0;

 protected:
  ~Observer() = default;
};

class Server : private sim::Guest, private sim::Initiator, private Connection::Host {
 public:
  // `listener`: bound, listening, non-blocking. @throws std::system_error
  Server(std::shared_ptr<sim::Device> device, Config config, UniqueFd listener, Observer& observer);
  ~Server() override;
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Any thread. The answer to `describe`.
  void described(uint64_t connection, std::optional<Disk> disk);
  void close();
  void drop();
  // Ends at once, whether the device's thread lives or not; the observer hears of it within the call,
  // and nothing from then on. Not from the device's thread.
  void abandon();
  // After it ended: no command is under way any more.
  bool idle();

  struct Counts {
    size_t connections;
    uint64_t accepted;
    uint64_t commands;
  };
  Counts counts();

 private:
  struct Client {
    std::unique_ptr<Connection> connection;
    int polledFd = -1;
    uint32_t polledEvents = 0;
    bool touched = false;
  };
  // A request on its way through the device.
  struct Slot {
    Client* client = nullptr;
    std::unique_ptr<Request> request;
    sim::TimePoint since;
  };
  struct Mail {
    enum class Kind { described, close, drop } kind;
    uint64_t connection = 0;
    std::optional<Disk> disk{};
  };

  // sim::Guest
  int fd() const override { return poll_.get(); }
  sim::TimePoint deadline() const override;
  bool serve(bool readable, sim::TimePoint now) override;
  // sim::Initiator
  void finished(const sim::Completion& completion) override;
  void batchEnd() override;
  // Connection::Host
  void start(Connection& connection, std::unique_ptr<Request> request) override;
  void describe(Connection& connection) override;
  void startTls(Connection& connection, UniqueFd socket, UniqueFd plain) override;
  sim::BufferPool* pool() override { return device_->pool(); }

  void post(Mail mail);
  bool takeNews(sim::TimePoint now);
  void takeMail(const Mail& mail);
  void takeCompletion(const sim::Completion& completion, sim::TimePoint now);
  void proceed(uint32_t slot);
  void submit(uint32_t slot, const Request::Scsi& command);
  void release(uint32_t slot);
  void pollSockets(sim::TimePoint now);
  void acceptClients(sim::TimePoint now);
  void watchListener(bool watch);
  void checkDeadlines(sim::TimePoint now);
  void touch(Client& client);
  Client* find(uint64_t connection);
  void settle();
  void rearm(Client& client);
  void reportClosed();

  const std::shared_ptr<sim::Device> device_;
  const Config config_;
  Observer& observer_;
  UniqueFd poll_;
  UniqueFd wake_;  // eventfd: there are news
  UniqueFd listener_;
  sim::TimePoint listenAgain_ = sim::TimePoint::max();  // after a failure to accept
  bool closing_ = false;
  bool reported_ = false;

  std::unordered_map<uint64_t, Client> clients_;
  std::deque<std::pair<sim::TimePoint, uint64_t>> handshakes_;  // in order of time
  std::deque<std::pair<sim::TimePoint, uint32_t>> repeats_;     // likewise: slots
  std::vector<Client*> touched_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> freeSlots_;
  std::vector<sim::Request> batch_;
  std::vector<sim::Completion> taken_;
  uint64_t nextConnection_ = 1;

  std::mutex lock_;  // guards the rest
  std::vector<sim::Completion> completed_;
  std::vector<Mail> mail_;
  size_t underWay_ = 0;  // commands
  Counts counts_{};
};

}  // namespace tcmu::nbd
